"""Floor 7, the cloud: SageMaker's container contract, jobs, accounts, prices."""
