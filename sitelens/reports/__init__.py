"""Complete experiments: runs, comparisons, suites and the figures of figures/, with the files that they write."""
