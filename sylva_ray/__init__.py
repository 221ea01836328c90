"""sylva_ray: personal adversarial defences for a fleet of edge clients, simulated on a Ray cluster."""

__version__ = "0.1.0"
