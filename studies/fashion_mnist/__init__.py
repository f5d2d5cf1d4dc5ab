"""ShiftAddViT's claims on Fashion-MNIST: `python -m studies.fashion_mnist --help`."""
