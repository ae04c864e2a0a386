"""What is asked of Kubernetes for a job, as manifests: pods and what stands beside them. No I/O."""
