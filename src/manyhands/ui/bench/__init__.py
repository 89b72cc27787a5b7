"""`manyhands bench GROUP`: what the house measures of itself, beside its targets and the machine's floors."""
