"""A cohort as the unit of work: from a list of slides to a table of results for a study."""
