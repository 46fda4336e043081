"""Studies: a grid of jobs on shared bases, their records, and tables with intervals from these."""
