"""Methods of federated adversarial training, one file each."""
