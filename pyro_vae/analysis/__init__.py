"""Looking into the latent space; pictures."""
