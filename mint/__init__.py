"""MINT: moves what a multimodal model knows into a decoder that sees one modality. The public names, and nothing else."""
