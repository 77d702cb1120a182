"""The DC-AE autoencoder: latent to pixels and back."""
