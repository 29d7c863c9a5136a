"""EDM diffusion: preconditioning, noise levels, samplers."""
