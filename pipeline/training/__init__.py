"""Training one group, and blending what the groups of all grains learnt."""
