"""A reward model behind HTTP that answers score and credit per token: what ``attnshape serve`` runs.

protocol   what goes in and out, as JSON
batching   the queue: batches by tokens, the oldest request first
workers    one process per device, started again when it dies
app        the HTTP side: admission, errors, health, metrics
"""
