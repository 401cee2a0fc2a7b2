package fusefs

// What the external tests reach besides the API.
var (
	FileName       = fileName
	PointNames     = pointNames
	ParseMountinfo = func(text string) (dirs []string) {
		for _, m := range parseMountinfo(text) {
			dirs = append(dirs, m.device+" "+m.dir+" "+m.fsType+" "+m.source)
		}
		return dirs
	}
)
