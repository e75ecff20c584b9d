"""One module a framework, found by being here.

Each has `sniff(head, tail)`, how sure it is from 0 to 1 that it wrote these bytes, and `parse(log)`, a Draft for each
run in the log. What surrounds a run (scheduler, GPUs, how it ended) is read by `chiplog.ledger.parse` for all alike.
"""
