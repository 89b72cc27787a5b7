"""The task file and the plan that `manyhands init` writes: modules of this package, checked like the rest."""
