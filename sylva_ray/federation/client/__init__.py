"""The client side: a worker, local training and measurements."""
