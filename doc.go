// Package holdfast is a backup appliance for virtual machines: it keeps the
// blocks of their disks once each in a repository, and gives every restore
// point back as a block device over NBD and as files over FUSE.
//
// This root holds no code, only the test of the architecture. The parts are
// the folders beside it, imports point one way between them:
//
//	cmd/holdfast → appliance → { ingest → blockstore, hypervisor, nbdserver, fusefs } → image
//
// Package [github.com/holdfast-backup/holdfast/image] has the vocabulary that
// all of them share and is the place to start reading.
package holdfast
