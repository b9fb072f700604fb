"""Estimates: log weights, log p(x), the ELBO of a data set."""
