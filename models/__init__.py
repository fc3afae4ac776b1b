"""Small, plain-PyTorch architectures that passes are proven on. They know nobody."""
