package translate

import (
	"fmt"
	"maps"

	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	streamv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/stream/v3"
	"google.golang.org/protobuf/types/known/structpb"
)

// A logKey selects a format of the access log.
type logKey struct {
	direction corev3.TrafficDirection
	http      bool
}

// connectionFields are the fields of every line of the access log, each a JSON
// object; docs/xds.md explains them. Empty ones are left out.
func connectionFields() map[string]string {
	return map[string]string{
		"start":         "%START_TIME%",
		"duration_ms":   "%DURATION%",
		"source":        "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%",
		"destination":   "%DOWNSTREAM_LOCAL_ADDRESS%",
		"chain":         "%FILTER_CHAIN_NAME%",
		"cluster":       "%UPSTREAM_CLUSTER_RAW%",
		"upstream":      "%UPSTREAM_HOST%",
		"upstream_from": "%UPSTREAM_LOCAL_ADDRESS%",
		"bytes_in":      "%BYTES_RECEIVED%",
		"bytes_out":     "%BYTES_SENT%",
		"flags":         "%RESPONSE_FLAGS%",
		"failure":       "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
		"termination":   "%CONNECTION_TERMINATION_DETAILS%",
	}
}

// requestFields are added for HTTP, where a line is written for each request.
func requestFields() map[string]string {
	return map[string]string{
		"protocol":   "%PROTOCOL%",
		"method":     "%REQ(:METHOD)%",
		"authority":  "%REQ(:AUTHORITY)%",
		"path":       "%REQ(:PATH)%",
		"status":     "%RESPONSE_CODE%",
		"details":    "%RESPONSE_CODE_DETAILS%",
		"grpc":       "%GRPC_STATUS%",
		"route":      "%ROUTE_NAME%",
		"attempts":   "%UPSTREAM_REQUEST_ATTEMPT_COUNT%",
		"request_id": "%REQ(X-REQUEST-ID)%",
		"user_agent": "%REQ(USER-AGENT)%",
	}
}

func (t *Translator) prepareLogs() error {
	if t.opts.NoAccessLog {
		return nil
	}
	for direction, name := range map[corev3.TrafficDirection]string{
		corev3.TrafficDirection_OUTBOUND: "outbound",
		corev3.TrafficDirection_INBOUND:  "inbound",
	} {
		fields := connectionFields()
		fields["direction"] = name
		if err := t.prepareLog(logKey{direction: direction}, fields); err != nil {
			return err
		}
		maps.Copy(fields, requestFields())
		if err := t.prepareLog(logKey{direction: direction, http: true}, fields); err != nil {
			return err
		}
	}
	return nil
}

func (t *Translator) prepareLog(key logKey, fields map[string]string) error {
	format := &structpb.Struct{Fields: make(map[string]*structpb.Value, len(fields))}
	for name, value := range fields {
		format.Fields[name] = structpb.NewStringValue(value)
	}
	config, err := pack(&streamv3.StdoutAccessLog{
		AccessLogFormat: &streamv3.StdoutAccessLog_LogFormat{LogFormat: &corev3.SubstitutionFormatString{
			Format:          &corev3.SubstitutionFormatString_JsonFormat{JsonFormat: format},
			OmitEmptyValues: true,
		}},
	})
	if err != nil {
		return fmt.Errorf("make access log: %w", err)
	}
	t.logs[key] = []*accesslogv3.AccessLog{{
		Name:       "stdout",
		ConfigType: &accesslogv3.AccessLog_TypedConfig{TypedConfig: config},
	}}
	return nil
}
