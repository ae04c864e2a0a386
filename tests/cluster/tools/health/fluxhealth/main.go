// Says what Flux concludes from objects by the healthCheckExprs of a Kustomization.
//
//	fluxhealth EXPRESSIONS.json < objects.jsonl
//
// The file is one entry of healthCheckExprs, as JSON; the answers are as those of kstatus.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"

	"github.com/fluxcd/pkg/apis/kustomize"
	"github.com/fluxcd/pkg/runtime/cel"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

func main() {
	text, err := os.ReadFile(os.Args[1])
	must(err)
	var check kustomize.CustomHealthCheck
	must(json.Unmarshal(text, &check))
	evaluator, err := cel.NewStatusEvaluator(&check.HealthCheckExpressions)
	must(err)
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<26)
	for lines.Scan() {
		object := &unstructured.Unstructured{}
		must(object.UnmarshalJSON(lines.Bytes()))
		result, err := evaluator.Evaluate(context.Background(), object)
		must(err)
		answer, err := json.Marshal(map[string]string{
			"status":  string(result.Status),
			"message": result.Message,
		})
		must(err)
		fmt.Println(string(answer))
	}
	must(lines.Err())
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
