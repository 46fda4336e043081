"""Grids of `launch.study`: one file a study, with get_study()."""
