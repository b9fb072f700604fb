"""Analysis of the latent space; figures."""
