package e2e_test

import "testing"

// The JSON of the contract, as far as tests read values of it; TestJSON holds
// every field's presence and form.
type (
	backupResult struct {
		Point string       `json:"point"`
		Time  string       `json:"time"`
		Mode  string       `json:"mode"`
		Disks []backupDisk `json:"disks"`
	}
	backupDisk struct {
		Name         string `json:"name"`
		SizeBytes    int64  `json:"size_bytes"`
		ReadBytes    int64  `json:"read_bytes"`
		ChangedBytes int64  `json:"changed_bytes"`
		NewBytes     int64  `json:"new_bytes"`
		StoredBytes  int64  `json:"stored_bytes"`
	}
	point struct {
		ID    string `json:"id"`
		VM    string `json:"vm"`
		Time  string `json:"time"`
		Disks []struct {
			Name      string `json:"name"`
			SizeBytes int64  `json:"size_bytes"`
		} `json:"disks"`
	}
	extent struct {
		Offset int64 `json:"offset"`
		Length int64 `json:"length"`
	}
	diffResult struct {
		Disks []struct {
			Name    string   `json:"name"`
			Extents []extent `json:"extents"`
			Bytes   int64    `json:"bytes"`
		} `json:"disks"`
	}
	statsResult struct {
		Points       int64 `json:"points"`
		LogicalBytes int64 `json:"logical_bytes"`
		UniqueBytes  int64 `json:"unique_bytes"`
		StoredBytes  int64 `json:"stored_bytes"`
		Chunks       int64 `json:"chunks"`
		Segments     int64 `json:"segments"`
		ChunkSize    int64 `json:"chunk_size"`
	}
	verifyResult struct {
		CheckedChunks int64 `json:"checked_chunks"`
		CheckedBytes  int64 `json:"checked_bytes"`
		Errors        []any `json:"errors"`
	}
	gcResult struct {
		LiveChunks int64 `json:"live_chunks"`
		DeadChunks int64 `json:"dead_chunks"`
		FreedBytes int64 `json:"freed_bytes"`
	}
)

// backup backs image files up as one point of the VM "vm".
func (r *repo) backup(files ...string) backupResult {
	r.t.Helper()
	args := append([]string{"backup", "image"}, files...)
	return decode[backupResult](r.t, r.ok(append(args, "--vm", "vm", "--json")...))
}

// points lists every point.
func (r *repo) points() []point {
	r.t.Helper()
	return decode[[]point](r.t, r.ok("point", "list", "--json"))
}

// restored restores a point to a new raw file and returns its path.
func (r *repo) restored(point string, args ...string) string {
	r.t.Helper()
	path := r.t.TempDir() + "/restored.raw"
	r.ok(append([]string{"restore", "image", point, "--to", path}, args...)...)
	return path
}

// intact holds a point against the raw file it was made from.
func (r *repo) intact(t *testing.T, point, source string) {
	t.Helper()
	sameFile(t, r.restored(point), source)
}

// verified reads the whole repository back.
func (r *repo) verified() verifyResult {
	r.t.Helper()
	v := decode[verifyResult](r.t, r.ok("repo", "verify", "--json"))
	if len(v.Errors) != 0 {
		r.t.Errorf("repo verify: got errors %v, want none", v.Errors)
	}
	return v
}
