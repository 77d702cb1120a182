"""The published pipeline on transformers and diffusers, with which `bench` and `validate` compare ours."""
