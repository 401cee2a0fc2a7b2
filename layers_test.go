package holdfast_test

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"path"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/holdfast-backup/holdfast"

// layers is the architecture: for each part the parts it may import. A package
// belongs to the longest entry that is a prefix of its path, and may import
// whatever lies in its own part. Dependencies of others are not looked at.
var layers = map[string][]string{
	"image":             {},
	"systemd":           {},
	"internal/durable":  {},
	"internal/steady":   {},
	"internal/faultfs":  {"internal/durable"},
	"blockstore":        {"image", "internal/durable", "internal/steady"},
	"internal/guard":    {},
	"nbdserver":         {"image"},
	"nbdserver/overlay": {"image", "internal/durable"},
	"fusefs":            {"image"},
	"hypervisor":        {"image", "nbdserver"},
	"ingest":            {"image", "blockstore"},
	"appliance": {
		"image", "systemd", "internal/durable", "internal/guard",
		"blockstore", "nbdserver", "nbdserver/overlay", "fusefs", "hypervisor", "ingest",
	},
	"cmd/holdfast":       {"appliance", "systemd"},
	"cmd/holdfast-guard": {"systemd", "internal/durable", "internal/guard", "internal/steady"},
	"e2e":                {},
}

// testLayers are imports that only the tests of a part may add.
var testLayers = map[string][]string{
	"blockstore":         {"internal/faultfs"},
	"nbdserver":          {"systemd"},
	"nbdserver/overlay":  {"internal/faultfs"},
	"ingest":             {"internal/faultfs"},
	"appliance":          {"internal/faultfs"},
	"cmd/holdfast-guard": {"internal/faultfs"},
}

// goPackage is what the test reads of `go list -json`.
type goPackage struct {
	ImportPath   string
	Doc          string
	Imports      []string
	TestImports  []string
	XTestImports []string
}

// part returns the part a package of ours belongs to, "" if it has none.
func part(importPath string) string {
	for p := strings.TrimPrefix(importPath, module+"/"); p != "."; p = path.Dir(p) {
		if _, ok := layers[p]; ok {
			return p
		}
	}
	return ""
}

// forbidden returns those of the imports that a part must not have.
func forbidden(from string, imports []string, allowed ...[]string) []string {
	var found []string
	for _, imported := range imports {
		if !strings.HasPrefix(imported, module+"/") {
			continue
		}
		to := part(imported)
		if to != from && !slices.Contains(slices.Concat(allowed...), to) {
			found = append(found, strings.TrimPrefix(imported, module+"/"))
		}
	}
	return found
}

func TestLayers(t *testing.T) {
	packages := list(t)
	if len(packages) < 2 {
		t.Fatalf("go list found %d packages, want the whole module", len(packages))
	}
	for _, p := range packages {
		name := strings.TrimPrefix(p.ImportPath, module+"/")
		if p.Doc == "" {
			t.Errorf("%s has no package comment", name)
		}
		if p.ImportPath == module {
			continue
		}
		from := part(p.ImportPath)
		if from == "" {
			t.Errorf("%s is in no part of the table; give it a place in layers", name)
			continue
		}
		for _, bad := range forbidden(from, p.Imports, layers[from]) {
			t.Errorf("%s imports %s; %s may import only %q", name, bad, from, layers[from])
		}
		for _, bad := range forbidden(from, slices.Concat(p.TestImports, p.XTestImports), layers[from], testLayers[from]) {
			t.Errorf("a test of %s imports %s; %s may import only %q", name, bad, from, slices.Concat(layers[from], testLayers[from]))
		}
	}
}

// TestLayersCatch holds the checker itself against imports that must not pass.
func TestLayersCatch(t *testing.T) {
	for _, tt := range []struct {
		from, imported string
		ok             bool
	}{
		{"blockstore", "image/qcow2", true},
		{"image", "image/qcow2", true},
		{"image", "blockstore", false},
		{"nbdserver", "blockstore", false},
		{"cmd/holdfast", "blockstore", false},
		{"cmd/holdfast", "cmd/holdfast/internal/term", true},
		{"e2e", "image", false},
		{"appliance", "nowhere", false},
		{"appliance", "internal/faultfs", false},
	} {
		got := len(forbidden(tt.from, []string{"fmt", module + "/" + tt.imported}, layers[tt.from])) == 0
		if got != tt.ok {
			t.Errorf("%s importing %s: got allowed %v, want %v", tt.from, tt.imported, got, tt.ok)
		}
	}
}

func list(t *testing.T) []goPackage {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Doc,Imports,TestImports,XTestImports", "./...")
	out, err := cmd.Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		t.Fatalf("go list: %v\n%s", err, exit.Stderr)
	}
	if err != nil {
		t.Fatal(err)
	}
	var packages []goPackage
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		err := d.Decode(&p)
		if errors.Is(err, io.EOF) {
			return packages
		}
		if err != nil {
			t.Fatalf("go list -json: %v", err)
		}
		packages = append(packages, p)
	}
}
