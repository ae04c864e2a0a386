// Judges a CustomResourceDefinition and changes to its objects with the API server's own code.
//
//	checkcrd CRD.yaml < requests.jsonl
//
// A request is {"object": {...}, "old": {...} or null}; the answer is {"faults": [...], "object":
// with defaults, "cost": of its CEL rules}. Exit code 1 when the definition itself is refused.
package main

import (
	"bufio"
	"context"
	"fmt"
	"os"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/install"
	v1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/validation"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/cel"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/defaulting"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/listtype"
	"k8s.io/apiextensions-apiserver/pkg/apiserver/schema/pruning"
	schemavalidation "k8s.io/apiextensions-apiserver/pkg/apiserver/validation"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/json"
	celconfig "k8s.io/apiserver/pkg/apis/cel"
	"sigs.k8s.io/yaml"
)

type object = map[string]any

type request struct {
	Object object `json:"object"`
	Old    object `json:"old"`
}

type answer struct {
	Faults []string `json:"faults"`
	Object object   `json:"object"`
	Cost   int64    `json:"cost"`
}

type judge struct {
	schema    *schema.Structural
	validator schemavalidation.SchemaValidator
	rules     *cel.Validator
}

func main() {
	judge := newJudge(definition(os.Args[1]))
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<26)
	for lines.Scan() {
		var asked request
		must(json.Unmarshal(lines.Bytes(), &asked))
		line, err := json.Marshal(judge.answer(asked))
		must(err)
		fmt.Println(string(line))
	}
	must(lines.Err())
}

// definition reads a CRD and leaves with exit code 1 when the API server would refuse it.
func definition(path string) *apiextensions.CustomResourceDefinition {
	text, err := os.ReadFile(path)
	must(err)
	var external v1.CustomResourceDefinition
	must(yaml.UnmarshalStrict(text, &external))
	v1.SetDefaults_CustomResourceDefinitionSpec(&external.Spec)
	scheme := runtime.NewScheme()
	install.Install(scheme)
	var crd apiextensions.CustomResourceDefinition
	must(scheme.Convert(&external, &crd, nil))
	crd.Status.StoredVersions = []string{crd.Spec.Versions[0].Name}
	faults := validation.ValidateCustomResourceDefinition(context.Background(), &crd)
	for _, fault := range faults {
		fmt.Fprintln(os.Stderr, fault)
	}
	if len(faults) > 0 {
		os.Exit(1)
	}
	return &crd
}

func newJudge(crd *apiextensions.CustomResourceDefinition) judge {
	whole, err := apiextensions.GetSchemaForVersion(crd, crd.Spec.Versions[0].Name)
	must(err)
	structural, err := schema.NewStructural(whole.OpenAPIV3Schema)
	must(err)
	validator, _, err := schemavalidation.NewSchemaValidator(whole.OpenAPIV3Schema)
	must(err)
	return judge{structural, validator, cel.NewValidator(structural, true, celconfig.PerCallLimit)}
}

func (j judge) answer(asked request) answer {
	faults := []string{}
	for _, unknown := range j.admit(asked.Object) {
		faults = append(faults, unknown+": unknown field")
	}
	var old any
	if asked.Old != nil {
		j.admit(asked.Old)
		old = asked.Old
	}
	wrong := schemavalidation.ValidateCustomResource(nil, asked.Object, j.validator)
	wrong = append(wrong, listtype.ValidateListSetsAndMaps(nil, j.schema, asked.Object)...)
	cost := int64(0)
	if len(wrong) == 0 {
		broken, left := j.rules.Validate(
			context.Background(), nil, j.schema, asked.Object, old, celconfig.RuntimeCELCostBudget)
		wrong = append(wrong, broken...)
		cost = celconfig.RuntimeCELCostBudget - left
	}
	for _, each := range wrong {
		faults = append(faults, each.Error())
	}
	return answer{faults, asked.Object, cost}
}

// admit prunes and defaults an object as the API server does, and returns the unknown fields.
func (j judge) admit(value object) []string {
	track := schema.UnknownFieldPathOptions{TrackUnknownFieldPaths: true}
	unknown := pruning.PruneWithOptions(value, j.schema, true, track)
	defaulting.PruneNonNullableNullsWithoutDefaults(value, j.schema)
	defaulting.Default(value, j.schema)
	return unknown
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
}
