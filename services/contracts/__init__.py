"""HTTP and file contracts that the services, the trainer, the gateway and the evaluation share.

Only pydantic and the standard library are imported here, so that every process can afford these modules.
"""
