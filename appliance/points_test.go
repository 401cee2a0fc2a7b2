package appliance_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/holdfast-backup/holdfast/appliance"
)

// Ids of points; two of them begin alike.
const (
	older = "aaaaaaaa000000000000000000000001"
	newer = "aaaaaaaa000000000000000000000002"
	other = "bbbbbbbb000000000000000000000003"
)

// threePoints returns a data folder with the points older and newer of VM "web", an
// hour apart, and other of the VM "a@b".
func threePoints(t *testing.T) (dir string, noon time.Time) {
	t.Helper()
	dir, noon = newData(t), time.Date(2026, 1, 31, 12, 0, 0, 250e6, time.UTC)
	commit(t, dir, newer, "web", noon.Add(time.Hour))
	commit(t, dir, older, "web", noon)
	commit(t, dir, other, "a@b", noon)
	return dir, noon
}

func TestResolvePoint(t *testing.T) {
	t.Parallel()
	dir, _ := threePoints(t)
	a := open(t, dir)
	for _, tt := range []struct {
		ref, want string
		kind      appliance.Kind
	}{
		{older, older, 0},
		{other[:8], other, 0},
		{"BBBBBBBB", other, 0},
		{newer[:8], "", appliance.Invalid}, // of two
		{other[:7], "", appliance.Invalid},
		{"not hexadecimal", "", appliance.Invalid},
		{"", "", appliance.Invalid},
		{"cccccccc", "", appliance.NotFound},
		{other + "00", "", appliance.NotFound},
		{"web@latest", newer, 0},
		{"a@b@latest", other, 0},
		{"web@2026-01-31T13:00:00.25Z", newer, 0},
		{"web@2026-01-31T13:00:00Z", older, 0},
		{"web@2026-01-31T13:00:00.25+01:00", older, 0},
		{"web@2026-01-31T12:00:00Z", "", appliance.NotFound},
		{"web@2026-01-31", "", appliance.Invalid},
		{"web@", "", appliance.Invalid},
		{"nobody@latest", "", appliance.NotFound},
		{"@latest", "", appliance.NotFound},
	} {
		got, err := a.ResolvePoint(tt.ref)
		if got.ID != tt.want || err != nil && appliance.KindOf(err) != tt.kind || (err == nil) != (tt.want != "") {
			t.Errorf("%q: got point %q, %v, want %q, kind %d", tt.ref, got.ID, err, tt.want, tt.kind)
		}
	}
}

func TestPoints(t *testing.T) {
	t.Parallel()
	dir, noon := threePoints(t)
	a := open(t, dir)
	var ids []string
	for _, p := range a.Points("") {
		ids = append(ids, p.ID)
	}
	if want := []string{older, other, newer}; !slices.Equal(ids, want) {
		t.Errorf("got points %v, want %v, oldest first", ids, want)
	}
	web := a.Points("web")
	if len(web) != 2 || web[0].ID != older || !web[0].Time.Equal(noon) || len(web[0].Disks) != 1 ||
		web[0].Disks[0] != (appliance.Disk{Name: "vda", Size: miB}) {
		t.Errorf("got points of web %+v, want two, the first with the empty disk vda", web)
	}
	if none := a.Points("nobody"); none == nil || len(none) != 0 {
		t.Errorf("got points of nobody %v, want an empty list that is not null", none)
	}
}

func TestDeletePoints(t *testing.T) {
	t.Parallel()
	dir, _ := threePoints(t)
	damaged := filepath.Join(dir, "points", other+".point")
	if err := os.WriteFile(damaged, []byte("rotten"), 0o600); err != nil {
		t.Fatal(err)
	}
	a := open(t, dir)
	if _, err := a.ResolvePoint(other); err == nil || appliance.KindOf(err) != appliance.Failed {
		t.Errorf("a damaged point: got %v, want an error of its own", err)
	}
	if got, err := a.DeletePoints(t.Context(), []string{"web@latest", "cccccccc"}); appliance.KindOf(err) != appliance.NotFound || len(got) != 0 {
		t.Errorf("one of two is missing: got %v, %v, want nothing deleted", got, err)
	}
	if n := len(a.Points("")); n != 2 {
		t.Errorf("got %d points, want both still there", n)
	}
	got, err := a.DeletePoints(t.Context(), []string{"web@latest", newer, other[:8]})
	if want := []string{newer, other}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, %v, want each deleted once: %v", got, err, want)
	}
	if _, err := a.Collect(t.Context(), appliance.CollectOptions{}, nil); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(damaged); err == nil {
		t.Errorf("the damaged point is still there")
	}
	if points := a.Points(""); len(points) != 1 || points[0].ID != older {
		t.Errorf("got points %+v, want %s alone", points, older)
	}
}

func TestDiffPoints(t *testing.T) {
	t.Parallel()
	a := open(t, newData(t))
	disk := noise(2*miB+512, 1)
	first := backup(t, a, "web", write(t, "vda.raw", disk))
	changed := slices.Clone(disk)
	changed[3*chunk]++
	changed[5*chunk-1]++
	changed[len(disk)-1]++
	second := backup(t, a, "web", write(t, "vda.raw", changed), write(t, "vdb.raw", noise(miB, 2)))

	got, err := a.DiffPoints(t.Context(), first.Point, second.Point, "")
	if err != nil || len(got.Disks) != 2 {
		t.Fatalf("got %+v, %v, want two disks", got, err)
	}
	vda, vdb := got.Disks[0], got.Disks[1]
	if want := []appliance.Extent{{3 * chunk, 2 * chunk}, {2 * miB, 512}}; vda.Name != "vda" || !slices.Equal(vda.Extents, want) || vda.Bytes != 2*chunk+512 {
		t.Errorf("got %+v, want vda to differ in %v", vda, want)
	}
	if want := []appliance.Extent{{0, miB}}; vdb.Name != "vdb" || !slices.Equal(vdb.Extents, want) || vdb.Bytes != miB {
		t.Errorf("got %+v, want vdb to differ in %v", vdb, want)
	}
	only, err := a.DiffPoints(t.Context(), second.Point, first.Point, "vdb")
	if err != nil || len(only.Disks) != 1 || only.Disks[0].Bytes != miB {
		t.Errorf("only vdb, the other way: got %+v, %v, want its 1 MiB", only, err)
	}
	if _, err := a.DiffPoints(t.Context(), first.Point, second.Point, "vdc"); appliance.KindOf(err) != appliance.NotFound {
		t.Errorf("a disk of neither: got %v, want it not found", err)
	}
}
