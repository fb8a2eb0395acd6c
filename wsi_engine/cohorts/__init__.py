"""Which slides a study has, whose they are, how they are split, and what is wrong with that, before anything runs."""
