// Says what a health check in Lua concludes from objects, run as Argo CD runs it: gopher-lua with the
// libraries that Argo CD opens, the object as the global obj, a table with status and message back.
//
//	argohealth CHECK.lua < objects.jsonl
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"

	lua "github.com/yuin/gopher-lua"
)

func main() {
	script, err := os.ReadFile(os.Args[1])
	must(err)
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<26)
	for lines.Scan() {
		var object any
		must(json.Unmarshal(lines.Bytes(), &object))
		answer, err := json.Marshal(health(string(script), object))
		must(err)
		fmt.Println(string(answer))
	}
	must(lines.Err())
}

func health(script string, object any) map[string]string {
	state := lua.NewState(lua.Options{SkipOpenLibs: true})
	defer state.Close()
	for name, open := range map[string]lua.LGFunction{
		lua.LoadLibName: lua.OpenPackage,
		lua.BaseLibName: lua.OpenBase,
		lua.TabLibName:  lua.OpenTable,
	} {
		must(state.CallByParam(lua.P{Fn: state.NewFunction(open), Protect: true}, lua.LString(name)))
	}
	state.SetGlobal("obj", value(state, object))
	must(state.DoString(script))
	answer, isTable := state.Get(-1).(*lua.LTable)
	if !isTable {
		must(fmt.Errorf("the script returned %s, not a table", state.Get(-1).Type()))
	}
	return map[string]string{
		"status":  lua.LVAsString(answer.RawGetString("status")),
		"message": lua.LVAsString(answer.RawGetString("message")),
	}
}

func value(state *lua.LState, from any) lua.LValue {
	switch from := from.(type) {
	case bool:
		return lua.LBool(from)
	case float64:
		return lua.LNumber(from)
	case string:
		return lua.LString(from)
	case []any:
		table := state.CreateTable(len(from), 0)
		for _, each := range from {
			table.Append(value(state, each))
		}
		return table
	case map[string]any:
		table := state.CreateTable(0, len(from))
		for key, each := range from {
			table.RawSetString(key, value(state, each))
		}
		return table
	}
	return lua.LNil
}

func must(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
