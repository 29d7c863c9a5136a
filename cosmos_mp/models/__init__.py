"""Networks of Cosmos-Transfer1: base DiT, control branch, the two as one, and the discriminator. Only maths; no parallelism, no roles."""
