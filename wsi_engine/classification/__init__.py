"""Slides in, classes out: the heads of a run, what they say of a slide, and pictures of where they looked."""
