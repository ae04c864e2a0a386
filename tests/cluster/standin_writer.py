"""A client that writes one ConfigMap after another: `standin_writer.py KUBECONFIG NAMESPACE COUNT`.

Prints the name of each as soon as it has the answer, or the code with which it was refused.
"""

import sys

from kubernetes import client, config


def main(kubeconfig: str, namespace: str, count: int) -> None:
    core = client.CoreV1Api(config.new_client_from_config(kubeconfig))
    for number in range(1, count + 1):
        name = f"map-{number}"
        try:
            core.create_namespaced_config_map(namespace, {"metadata": {"name": name}})
        except client.ApiException as refused:
            print(refused.status, flush=True)
        else:
            print(name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
