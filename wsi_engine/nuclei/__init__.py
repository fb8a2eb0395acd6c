"""Nuclei: their segmentation without annotation, and what is measured on them."""
