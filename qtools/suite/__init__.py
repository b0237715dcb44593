"""The course as a whole: running its chapters, its results, figures and claims."""
