package podwatch

import (
	"errors"
	"fmt"
	"net/url"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// Requests of a second and at once. Reading is a handful of long requests;
// reporting may have as many short ones as there are pods, and has a limit of
// its own so that it never holds reading up.
const (
	readQPS, readBurst     = 10, 20
	reportQPS, reportBurst = 10, 20
)

const (
	protobufType = "application/vnd.kubernetes.protobuf"
	jsonType     = "application/json"
)

// An access is how the API server is reached. It has clients for the few API
// groups that are used: the clientset of client-go would register them all.
type access struct {
	host      string
	core      rest.Interface
	report    rest.Interface // core again, with the limit for reports
	discovery rest.Interface
	gateway   rest.Interface
	metadata  metadata.Interface
}

// loadConfig reads a kubeconfig, or with "" what a pod is given.
func loadConfig(kubeconfig string) (*rest.Config, error) {
	if kubeconfig == "" {
		c, err := rest.InClusterConfig()
		if errors.Is(err, rest.ErrNotInCluster) {
			return nil, errors.New("find the API server: this is no pod of a cluster (KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set); outside of one give a kubeconfig")
		}
		if err != nil {
			return nil, fmt.Errorf("read the pod's service account: %w", err)
		}
		return c, nil
	}
	c, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("read kubeconfig %s: %w", kubeconfig, err)
	}
	return c, nil
}

// newAccess makes the clients; it sends nothing. Kubernetes' own types come as
// protobuf if the server has that.
func newAccess(config *rest.Config, userAgent string) (*access, error) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, discoveryv1.AddToScheme, gatewayv1.Install} {
		if err := add(scheme); err != nil {
			return nil, fmt.Errorf("register Kubernetes types: %w", err)
		}
	}
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})

	base := rest.CopyConfig(config)
	base.UserAgent = userAgent
	base.QPS, base.Burst = readQPS, readBurst
	base.Timeout = 0 // it would end every watch; see answerTimeout
	base.WarningHandlerWithContext = rest.NoWarnings{}
	base.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()

	var errs []error
	client := func(gv schema.GroupVersion, protobuf bool, change func(*rest.Config)) rest.Interface {
		c := rest.CopyConfig(base)
		c.GroupVersion, c.APIPath = &gv, "/apis"
		if gv.Group == "" {
			c.APIPath = "/api"
		}
		c.AcceptContentTypes, c.ContentType = jsonType, jsonType
		if protobuf {
			c.AcceptContentTypes, c.ContentType = protobufType+","+jsonType, protobufType
		}
		if change != nil {
			change(c)
		}
		made, err := rest.RESTClientFor(c)
		errs = append(errs, err)
		return made
	}
	a := &access{
		host: config.Host,
		core: client(corev1.SchemeGroupVersion, true, nil),
		report: client(corev1.SchemeGroupVersion, true, func(c *rest.Config) {
			c.QPS, c.Burst = reportQPS, reportBurst
		}),
		discovery: client(discoveryv1.SchemeGroupVersion, true, nil),
		gateway:   client(schema.GroupVersion(gatewayv1.GroupVersion), false, nil),
	}
	made, err := metadata.NewForConfig(base)
	a.metadata = made
	if err := errors.Join(append(errs, err)...); err != nil {
		return nil, fmt.Errorf("make a client of the API server at %s: %w", config.Host, err)
	}
	return a, nil
}

// NoAnswer says whether err of a KindHealth is that the API server cannot be
// reached, or cannot answer anybody just now: nothing that is wrong with who asks.
func NoAnswer(err error) bool {
	var request *url.Error
	return errors.As(err, &request) || errors.Is(err, errNoAnswer) ||
		apierrors.IsServiceUnavailable(err) || apierrors.IsInternalError(err) ||
		apierrors.IsTooManyRequests(err) || apierrors.IsServerTimeout(err) || apierrors.IsTimeout(err)
}

// explain says what a failed request means and what is to be done about it. The
// text is the same for all resources if the cause has nothing to do with them.
func (a *access) explain(verb string, resource schema.GroupResource, err error) error {
	var request *url.Error
	switch {
	case apierrors.IsUnauthorized(err):
		return fmt.Errorf("log in to API server %s: it does not accept the agent's credentials (401): the token or certificate is wrong, has expired, or its service account was deleted", a.host)
	case apierrors.IsForbidden(err):
		return fmt.Errorf("%s %s: forbidden (403): the agent's role must allow verb %q on resource %q of API group %q: %w",
			verb, resource, verb, resource.Resource, resource.Group, err)
	case errors.As(err, &request):
		return &unreachableError{host: a.host, err: request}
	}
	return fmt.Errorf("%s %s: %w", verb, resource, err)
}

// An unreachableError leaves the URL out of what is said: it is another one for
// each resource.
type unreachableError struct {
	host string
	err  *url.Error
}

// Error implements error.
func (e *unreachableError) Error() string {
	return "reach API server " + e.host + ": " + e.err.Err.Error()
}

// Unwrap returns what the client said.
func (e *unreachableError) Unwrap() error { return e.err }
