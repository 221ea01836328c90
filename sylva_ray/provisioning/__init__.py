"""Cluster files checked without a cloud, and what a run asks of the cluster that they describe."""
