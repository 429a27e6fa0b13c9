package inject

import (
	"fmt"
	"strings"

	"go.yaml.in/yaml/v3"
)

// parseValues reads values as Helm does: what is not there stays as in base.
func parseValues(base map[string]any, data []byte) (map[string]any, error) {
	over := map[string]any{}
	if err := yaml.Unmarshal(data, &over); err != nil {
		return nil, err
	}
	return merge(base, over), nil
}

// merge returns base with the entries of over. Maps are merged, everything else
// is replaced; null takes an entry away.
func merge(base, over map[string]any) map[string]any {
	merged := make(map[string]any, len(base)+len(over))
	for k, v := range base {
		merged[k] = v
	}
	for k, v := range over {
		switch v := v.(type) {
		case nil:
			delete(merged, k)
		case map[string]any:
			under, _ := merged[k].(map[string]any)
			merged[k] = merge(under, v)
		default:
			merged[k] = v
		}
	}
	return merged
}

// lookup returns the value at a path such as proxy.resources.limits.cpu, nil if
// there is none.
func lookup(values map[string]any, path string) any {
	var at any = values
	for key := range strings.SplitSeq(path, ".") {
		m, ok := at.(map[string]any)
		if !ok {
			return nil
		}
		at = m[key]
	}
	return at
}

// scalar returns the text of a value that is no map and no list.
func scalar(v any) (string, error) {
	switch v := v.(type) {
	case nil:
		return "", nil
	case map[string]any, []any:
		return "", fmt.Errorf("want one value, got %v", v)
	default:
		return fmt.Sprint(v), nil
	}
}

// stringList returns a list of texts.
func stringList(v any) ([]string, error) {
	if v == nil {
		return nil, nil
	}
	items, ok := v.([]any)
	if !ok {
		return nil, fmt.Errorf("want a list, got %v", v)
	}
	list := make([]string, len(items))
	for i, item := range items {
		if list[i], ok = item.(string); !ok {
			return nil, fmt.Errorf("want a list of texts, got %v", item)
		}
	}
	return list, nil
}
