"""Key derivation: what a chunk may ask for, and the engines that carry it out."""
