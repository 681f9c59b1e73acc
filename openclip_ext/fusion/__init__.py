"""The fusion model: cross-attention over the tokens of OpenCLIP's towers, after ALBEF (Li et al., NeurIPS 2021)."""
