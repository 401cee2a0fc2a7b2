package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"filippo.io/age"
)

// identity makes an age identity and returns its file and its public key.
func identity(t *testing.T) (file, public string) {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	return textFile(t, id.String()+"\n"), id.Recipient().String()
}

func textFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestKeys changes who can open a repository, and has what cannot be done refused.
func TestKeys(t *testing.T) {
	t.Parallel()
	data := filepath.Join(t.TempDir(), "data")
	alice, alicePublic := identity(t)
	bob, bobPublic := identity(t)
	_, evePublic := identity(t)
	passphrase := textFile(t, "correct horse\n")
	ok(t, "--data", data, "init", "--recipient", alicePublic)
	as := func(file string, args ...string) []string {
		return append([]string{"--data", data, "--identity-file", file}, args...)
	}
	type key struct {
		ID, Kind, Label, Created, Recipient string
		Current, Verified                   bool
	}
	list := func(args []string) (keys []key) {
		t.Helper()
		decode(t, ok(t, append(args, "key", "list", "--json")...), &keys)
		return keys
	}
	keys := list(as(alice))
	if len(keys) != 1 || keys[0].Recipient != alicePublic || !keys[0].Current || keys[0].Kind != "recipient" {
		t.Fatalf("a new repository: got keys %+v", keys)
	}
	first := keys[0].ID
	var added key
	decode(t, ok(t, as(alice, "key", "add", "--recipient", bobPublic, "--label", "Bob", "--json")...), &added)
	if added.Recipient != bobPublic || added.Label != "Bob" || added.Verified {
		t.Errorf("add: got %+v", added)
	}
	if got := ok(t, as(bob, "key", "rotate", first, "--new-passphrase-file", passphrase)...); !strings.Contains(got, "took the place of "+first) {
		t.Errorf("rotate: got %q", got)
	}
	if got := ok(t, as(bob, "key", "list")...); !strings.Contains(got, "passphrase") || !strings.Contains(got, "Bob") || !strings.Contains(got, bobPublic) {
		t.Errorf("list: got %q", got)
	}
	if got := ok(t, as(bob, "key", "add", "--recipient", evePublic)...); !strings.Contains(got, "it was not tried") {
		t.Errorf("add whose identity is not there: got %q", got)
	}
	for _, k := range list([]string{"--data", data, "--passphrase-file", passphrase}) {
		if k.Current != (k.Kind == "passphrase") {
			t.Errorf("the passphrase opened it: got %+v", k)
		}
		if k.Recipient != bobPublic {
			ok(t, as(bob, "key", "remove", k.ID)...)
		}
	}
	left := list(as(bob))
	if len(left) != 1 {
		t.Fatalf("got keys %+v, want one", left)
	}
	plain, _, _ := newRepo(t)
	if got := ok(t, "--data", plain, "key", "list", "--json"); got != "[]\n" {
		t.Errorf("keys of a plain repository: got %q, want none", got)
	}
	for _, tt := range []struct {
		args []string
		code int
		says string
	}{
		{as(alice, "key", "list"), exitRefused, "no identity given"},
		{[]string{"--data", data, "key", "list"}, exitRefused, "none was given"},
		{as(bob, "key", "remove", left[0].ID), exitRefused, "the last key"},
		{as(bob, "key", "remove", "00000000"), exitNotFound, "00000000"},
		{as(bob, "key", "remove"), exitUsage, "KEY"},
		{as(bob, "key", "rotate", left[0].ID), exitUsage, "new-passphrase-file"},
		{as(bob, "key", "add"), exitUsage, "new-passphrase-file"},
		{as(bob, "key", "add", "--recipient", "age1x", "--new-passphrase-file", passphrase), exitUsage, "recipient"},
		{as(bob, "key", "add", "--recipient", "age1x"), exitUsage, "age1x"},
		{as(bob, "key", "add", "--recipient", evePublic, "--label", strings.Repeat("x", 65)), exitUsage, "64 bytes"},
		{as(bob, "key", "add", "--new-passphrase-file", "/gone"), exitNotFound, "/gone"},
		{[]string{"--data", plain, "key", "add", "--recipient", evePublic}, exitRefused, "not encrypted"},
		{[]string{"--data", plain, "--passphrase-file", passphrase, "key", "list"}, exitFailed, "nothing is encrypted"},
	} {
		got := holdfast(t.Context(), tt.args...)
		if got.code != tt.code || !strings.Contains(got.stderr, tt.says) || strings.Count(got.stderr, "\n") != 1 || got.stdout != "" {
			t.Errorf("holdfast %q: got %+v, want status %d and one line that says %q", tt.args[2:], got, tt.code, tt.says)
		}
	}
}
