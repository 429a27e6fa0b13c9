package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Media types of the OCI image specification.
const (
	typeIndex    = "application/vnd.oci.image.index.v1+json"
	typeManifest = "application/vnd.oci.image.manifest.v1+json"
	typeConfig   = "application/vnd.oci.image.config.v1+json"
	typeLayer    = "application/vnd.oci.image.layer.v1.tar+gzip"
)

// The parts of the OCI image specification that are written here.
type (
	descriptor struct {
		MediaType   string            `json:"mediaType"`
		Digest      string            `json:"digest"`
		Size        int               `json:"size"`
		Annotations map[string]string `json:"annotations,omitempty"`
		Platform    *platform         `json:"platform,omitempty"`
	}
	platform struct {
		Architecture string `json:"architecture"`
		OS           string `json:"os"`
	}
	manifest struct {
		SchemaVersion int               `json:"schemaVersion"`
		MediaType     string            `json:"mediaType"`
		Config        *descriptor       `json:"config,omitempty"`
		Layers        []descriptor      `json:"layers,omitempty"`
		Manifests     []descriptor      `json:"manifests,omitempty"`
		Annotations   map[string]string `json:"annotations,omitempty"`
	}
	imageConfig struct {
		Created      time.Time       `json:"created"`
		Architecture string          `json:"architecture"`
		OS           string          `json:"os"`
		Config       containerConfig `json:"config"`
		RootFS       rootFS          `json:"rootfs"`
		History      []history       `json:"history"`
	}
	containerConfig struct {
		User       string            `json:"User"`
		Env        []string          `json:"Env"`
		Entrypoint []string          `json:"Entrypoint"`
		WorkingDir string            `json:"WorkingDir"`
		Labels     map[string]string `json:"Labels"`
	}
	rootFS struct {
		Type    string   `json:"type"`
		DiffIDs []string `json:"diff_ids"`
	}
	history struct {
		Created   time.Time `json:"created"`
		CreatedBy string    `json:"created_by"`
	}
	// dockerImage is an entry of manifest.json, which "docker load" reads.
	dockerImage struct {
		Config   string
		RepoTags []string
		Layers   []string
	}
)

// An image is the content of an image tar.
type image struct {
	digest string // of the manifest
	names  []string
	files  []named
}

type named struct {
	name string
	body []byte
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// blob adds a body under its digest and returns what leads to it.
func (i *image) blob(mediaType string, body []byte) descriptor {
	d := digest(body)
	i.files = append(i.files, named{blobName(d), body})
	return descriptor{MediaType: mediaType, Digest: d, Size: len(body)}
}

func blobName(digest string) string { return "blobs/" + strings.Replace(digest, ":", "/", 1) }

func (i *image) json(mediaType string, v any) (descriptor, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return descriptor{}, err
	}
	return i.blob(mediaType, b), nil
}

// A purpose is what an image says of itself, and what it runs.
type purpose struct{ title, description, user, entrypoint string }

var agentImage = purpose{"sluice-agent", "Node agent and CNI plugin of Sluice", "0:0", "/usr/local/bin/sluice-agent"}

// newImage puts an image together of layers, the one that changes least first.
func newImage(o options, is purpose, when time.Time, layers ...files) (*image, error) {
	i := &image{names: strings.Split(o.name, ",")}
	labels := map[string]string{
		"org.opencontainers.image.title":       is.title,
		"org.opencontainers.image.description": is.description,
		"org.opencontainers.image.licenses":    "Apache-2.0",
		"org.opencontainers.image.version":     o.version,
		"org.opencontainers.image.revision":    o.revision,
		"org.opencontainers.image.created":     when.Format(time.RFC3339),
	}
	config := imageConfig{
		Created: when, Architecture: o.arch, OS: "linux",
		Config: containerConfig{
			User: is.user, WorkingDir: "/",
			Env:        []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
			Entrypoint: []string{is.entrypoint},
			Labels:     labels,
		},
		RootFS: rootFS{Type: "layers"},
	}
	m := manifest{SchemaVersion: 2, MediaType: typeManifest, Annotations: labels}
	for _, layer := range layers {
		raw, err := layer.tar(when)
		if err != nil {
			return nil, err
		}
		var packed bytes.Buffer
		z, err := gzip.NewWriterLevel(&packed, gzip.DefaultCompression)
		if err != nil {
			return nil, err
		}
		if _, err := z.Write(raw); err != nil {
			return nil, err
		}
		if err := z.Close(); err != nil {
			return nil, err
		}
		m.Layers = append(m.Layers, i.blob(typeLayer, packed.Bytes()))
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest(raw))
		config.History = append(config.History, history{Created: when, CreatedBy: "deploy/image"})
	}
	c, err := i.json(typeConfig, config)
	if err != nil {
		return nil, err
	}
	m.Config = &c
	top, err := i.json(typeManifest, m)
	if err != nil {
		return nil, err
	}
	i.digest = top.Digest
	return i, i.index(o.arch, top, c, m.Layers)
}

// index adds what leads to the manifest: for OCI, and for Docker.
func (i *image) index(arch string, top, config descriptor, layers []descriptor) error {
	index := manifest{SchemaVersion: 2, MediaType: typeIndex}
	docker := dockerImage{Config: blobName(config.Digest), RepoTags: i.names}
	for _, name := range i.names {
		d := top
		d.Platform = &platform{Architecture: arch, OS: "linux"}
		d.Annotations = map[string]string{
			"io.containerd.image.name":          fullName(name),
			"org.opencontainers.image.ref.name": name[strings.LastIndexByte(name, ':')+1:],
		}
		index.Manifests = append(index.Manifests, d)
	}
	for _, l := range layers {
		docker.Layers = append(docker.Layers, blobName(l.Digest))
	}
	var errs []error
	add := func(name string, v any) {
		b, err := json.Marshal(v)
		errs = append(errs, err)
		i.files = append(i.files, named{name, b})
	}
	add("index.json", index)
	add("manifest.json", []dockerImage{docker})
	add("oci-layout", map[string]string{"imageLayoutVersion": "1.0.0"})
	return errors.Join(errs...)
}

// fullName is the name as runtimes keep it: one without a registry is Docker's.
func fullName(name string) string {
	if first, _, ok := strings.Cut(name, "/"); ok && strings.ContainsAny(first, ".:") {
		return name
	}
	return "docker.io/" + name
}

// writeFile writes the image whole or not at all and returns its size in bytes.
func (i *image) writeFile(out string, when time.Time) (size int64, err error) {
	f, err := os.CreateTemp(filepath.Dir(out), filepath.Base(out)+".*")
	if err != nil {
		return 0, fmt.Errorf("write image: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("write image %s: %w", out, err), os.Remove(f.Name()))
		}
	}()
	w := tar.NewWriter(f)
	for _, e := range i.files {
		h := &tar.Header{Name: e.name, Mode: 0o644, Size: int64(len(e.body)), ModTime: when, Typeflag: tar.TypeReg}
		if err := w.WriteHeader(h); err != nil {
			return 0, errors.Join(err, f.Close())
		}
		if _, err := w.Write(e.body); err != nil {
			return 0, errors.Join(err, f.Close())
		}
	}
	if err := errors.Join(w.Close(), f.Chmod(0o644)); err != nil {
		return 0, errors.Join(err, f.Close())
	}
	st, err := f.Stat()
	if err := errors.Join(err, f.Close()); err != nil {
		return 0, err
	}
	return st.Size(), os.Rename(f.Name(), out)
}
