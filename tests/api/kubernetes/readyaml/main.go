// Reads JSON strings, one a line, and says how Kubernetes reads each of them as YAML.
// tests/api/golden/yaml.jsonl is what it said.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"

	"sigs.k8s.io/yaml"
)

type answer struct {
	In  string          `json:"in"`
	Out json.RawMessage `json:"out,omitempty"`
	Err string          `json:"err,omitempty"`
}

func main() {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var said answer
		if err := json.Unmarshal(lines.Bytes(), &said.In); err != nil {
			panic(err)
		}
		out, err := yaml.YAMLToJSONStrict([]byte(said.In))
		if err != nil {
			said.Err = err.Error()
		} else {
			said.Out = out
		}
		line, err := json.Marshal(said)
		if err != nil {
			panic(err)
		}
		fmt.Println(string(line))
	}
}
