"""x"""
from typing import Any
import jax
def mixture(x_BTD, share_BTK, chosen_BTK, w_EDGF, w_EFD, gated):
    return x_BTD
