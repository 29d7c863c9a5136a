"""How good a student is: metrics, the features they compare, their confidence intervals, and the report. Nothing here runs a sampler."""
