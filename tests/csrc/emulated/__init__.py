"""The CPU kernels built for other processors and run in an emulator."""
