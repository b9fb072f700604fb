"""Pyro's inference, compiled: SVI, losses with their gradients, potential energies for HMC and NUTS, predictive draws."""
