"""The compiled core: the operators over it, and the way from tensors to pointers."""
