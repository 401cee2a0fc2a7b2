package main

import (
	"cmp"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version is set by the linker: -X main.version=…
var version string

// versionText returns the version, that of the build's sources if the linker set none.
func versionText() string {
	fromBuild := ""
	if info, ok := debug.ReadBuildInfo(); ok {
		fromBuild = info.Main.Version
	}
	return cmp.Or(version, fromBuild, "unknown")
}

func (p *program) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version",
		Example: "  holdfast version --json",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			v := struct {
				Version  string `json:"version"`
				Go       string `json:"go"`
				Platform string `json:"platform"`
			}{versionText(), runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH}
			return p.print(v, "holdfast %s (%s, %s)\n", v.Version, v.Go, v.Platform)
		},
	}
}
