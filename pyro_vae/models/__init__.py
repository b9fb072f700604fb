"""Models: nets, priors, posteriors, likelihoods, and the Pyro programs made of them."""
