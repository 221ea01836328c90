"""How much of others' models every client mixes into its own, decided on held-out images."""
