// Says what kstatus concludes from objects: one JSON document a line in, one answer a line out.
//
// An answer is {"status": "Current", "message": "..."}.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"

	"github.com/fluxcd/cli-utils/pkg/kstatus/status"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

func main() {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<26)
	for lines.Scan() {
		object := &unstructured.Unstructured{}
		must(object.UnmarshalJSON(lines.Bytes()))
		result, err := status.Compute(object)
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
